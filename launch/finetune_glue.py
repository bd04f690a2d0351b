"""Fine-tune a checkpoint on GLUE or on tasks of your own: megabert/commands/finetune.py."""

import signal

if __name__ == "__main__":
    # Without Python's own handler, Ctrl-C during the imports ends this process at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megabert.commands.finetune import command

    command("launch/finetune_glue.py")
