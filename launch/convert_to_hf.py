"""Export a training checkpoint to a Hugging Face folder: megabert/commands/export.py."""

from megabert.commands.export import command

if __name__ == "__main__":
    command("launch/convert_to_hf.py")
