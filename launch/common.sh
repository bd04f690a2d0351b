# Functions that the launch scripts share: output that never ends a script, and commands that end with their script.

# A closed stdout or stderr (`>&-`) becomes /dev/null: else the next file that is opened would take its place.
{ true >&1; } 2> /dev/null || exec > /dev/null
{ true >&2; } 2> /dev/null || exec 2> /dev/null
# Of a reader that has left, as in `| head`.
trap '' PIPE

# Print a line; a closed pipe or a full disk under the log does not matter.
say() { echo "$@" 2> /dev/null || true; }

# End with one line if the folder $1, which OUT names, is a URL, of which mkdir would make a folder, or an option.
check_output() {
    [[ $1 != -* ]] || { echo "OUT is '$1', which begins with a dash. Write it as ./$1" >&2; exit 2; }
    [[ $1 != *://* ]] || { echo "OUT is '$1', expected a path on a disk or a mounted file system" >&2; exit 2; }
}

# Enter the Python environment in the folder $1 (empty: stay in the one that is active). End with one line if it is
# missing, or has no command $2.
enter_environment() {
    if [ -n "$1" ]; then
        if [ ! -f "$1/bin/activate" ]; then
            echo "$1 is no Python environment: run bash launch/install.sh, or set VENV to the environment's folder" >&2
            exit 2
        fi
        source "$1/bin/activate"
    fi
    if ! command -v "$2" > /dev/null; then
        echo "there is no command $2: run bash launch/install.sh, then source .venv/bin/activate" >&2
        exit 2
    fi
}

# Print a port of this machine that nothing uses at the moment.
free_port() { python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Start a command in a process group of its own, so that all of its processes can be found; set `group` to its id. If
# this script is killed, the kernel sends the command SIGTERM; a Linux without setpriv (of util-linux) leaves it
# running.
start_group() {
    local with_script=()
    ! command -v setpriv > /dev/null || with_script=(setpriv --pdeathsig TERM --)
    set -m
    "${with_script[@]}" "$@" &
    group=$!
    set +m
}

alive() { pgrep -g "$group" > /dev/null; }

# Wait for the command of start_group; set `code` to its exit code. A trapped signal ends bash's own wait early, with
# the signal's code; the last wait, for a command that has ended, returns the command's.
wait_for_group() {
    while true; do
        wait "$group" || true
        kill -0 "$group" 2> /dev/null || break
    done
    code=0
    wait "$group" || code=$?
}

# Wait $1 seconds at most for the other processes of the group, and kill those that are left.
end_group() {
    local i
    for ((i = 0; i < 10 * $1; i++)); do alive || return 0; sleep 0.1; done
    kill -KILL -- "-$group" 2> /dev/null || true
}
