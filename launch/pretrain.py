"""Pretrain an encoder: megabert/commands/pretrain.py."""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.pretrain import command

    command("launch/pretrain.py")
