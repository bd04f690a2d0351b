"""Define the exit codes of the commands, which the launch scripts act on; launch/README.md explains them."""

# A user's error in a flag, or in what the flag names.
EXIT_USER_ERROR = 2
# A disk or a file system failed or is full: sysexits.h calls this EX_IOERR.
EXIT_DISK = 74
# A failure that may pass, EX_TEMPFAIL of sysexits.h: a store that does not answer.
EXIT_STORE_AWAY = 75
# The same code, from a process that runs one fine-tuning job: another command is running this job.
EXIT_BUSY = 75
# A training run stopped early, saved, and should be started again.
EXIT_REQUEUE = 85
# This rank ended because another one is gone, or hangs.
EXIT_PEER_LOST, EXIT_HANG = 86, 87
# Ctrl-C, as a shell reports it.
EXIT_INTERRUPTED = 130
