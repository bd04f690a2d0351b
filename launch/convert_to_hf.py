"""Export a training checkpoint to a Hugging Face folder: megabert/commands/export.py."""

import signal

if __name__ == "__main__":
    # Without Python's own handler, Ctrl-C during the imports ends this process at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megabert.commands.export import command

    command("launch/convert_to_hf.py")
