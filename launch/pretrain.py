"""Pretrain an encoder: megabert/commands/pretrain.py."""

import signal

if __name__ == "__main__":
    # Without Python's own handler, Ctrl-C during the imports ends this process at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megabert.commands.pretrain import command

    command("launch/pretrain.py")
