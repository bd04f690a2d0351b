"""Export a training checkpoint to a Hugging Face folder: megabert/commands/export.py."""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.export import command

    command("launch/convert_to_hf.py")
