"""Pretrain an encoder: megabert/commands/pretrain.py."""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.pretrain import command

    command("launch/pretrain.py")
