"""Convert a Hugging Face folder to a MegaBERT folder: megabert/commands/import_hf.py."""

from megabert.commands.import_hf import command

if __name__ == "__main__":
    command("launch/convert_from_hf.py")
