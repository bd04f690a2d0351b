"""Fine-tune a checkpoint on GLUE or on tasks of your own: megabert/commands/finetune.py."""

from megabert.commands.finetune import command

if __name__ == "__main__":
    command("launch/finetune_glue.py")
