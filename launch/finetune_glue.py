"""Fine-tune a checkpoint on GLUE or on tasks of your own: megabert/commands/finetune.py."""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.finetune import command

    command("launch/finetune_glue.py")
