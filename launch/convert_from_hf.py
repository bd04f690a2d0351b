"""Convert a Hugging Face folder to a MegaBERT folder: megabert/commands/import_hf.py."""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()
    from megabert.commands.import_hf import command

    command("launch/convert_from_hf.py")
