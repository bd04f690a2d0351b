"""Pretrain an encoder: megabert/commands/pretrain.py."""

from megabert.commands.pretrain import command

if __name__ == "__main__":
    command("launch/pretrain.py")
