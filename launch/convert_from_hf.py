"""Convert a Hugging Face folder to a MegaBERT folder: megabert/commands/import_hf.py."""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.import_hf import command

    command("launch/convert_from_hf.py")
