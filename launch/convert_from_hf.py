"""Convert a Hugging Face folder to a MegaBERT folder: megabert/commands/import_hf.py."""

import signal

if __name__ == "__main__":
    # Without Python's own handler, Ctrl-C during the imports ends this process at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megabert.commands.import_hf import command

    command("launch/convert_from_hf.py")
