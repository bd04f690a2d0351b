"""Turn a Hugging Face folder into one to pretrain or fine-tune from: megabert/commands/import_hf.py."""

from megabert.commands.import_hf import command

if __name__ == "__main__":
    command("launch/convert_from_hf.py")
