#!/usr/bin/env bash
# Make a SLURM cluster on this machine: slurmctld, N slurmd and munge, without systemd, cgroups or a database.
# Needs Debian or Ubuntu, and root.
#     bash tests/cluster/slurm.sh install            # packages, from the distribution
#     bash tests/cluster/slurm.sh up FOLDER [N]      # N nodes n1, n2, ... (2) of 2 cores
#     export SLURM_CONF=FOLDER/slurm.conf            # for SLURM's commands
#     bash tests/cluster/slurm.sh down FOLDER
set -euo pipefail
folder=${2:-}
case $1 in
install)
    # Keep the packages from starting daemons.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
        trap 'rm -f $policy' EXIT
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge > /dev/null
    ;;
up)
    nodes=${3:-2} ports=$((17000 + ${3:-2}))
    host=$(hostname -s)
    mkdir -p "$folder/state" /run/munge /var/log/munge /var/lib/munge
    chown munge:munge /run/munge /var/log/munge /var/lib/munge /etc/munge
    [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey -c -k /etc/munge/munge.key
    if ! munge -n > /dev/null 2>&1; then
        runuser -u munge -- /usr/sbin/munged
        touch "$folder/munged-was-started-here"
    fi
    cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort=16817
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmdSpoolDir=$folder/spool.%n
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
NodeName=DEFAULT CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-$ports]
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    for i in $(seq "$nodes"); do
        mkdir -p "$folder/spool.n$i"
        slurmd -N "n$i"
    done
    for _ in $(seq 100); do
        [ "$(sinfo -h -t idle -o %D 2> /dev/null)" != "$nodes" ] || exit 0
        sleep 0.2
    done
    sinfo
    exit 1
    ;;
down)
    for file in "$folder"/slurmd.*.pid "$folder/slurmctld.pid"; do
        [ ! -f "$file" ] || kill "$(cat "$file")"
    done
    [ ! -e "$folder/munged-was-started-here" ] || kill "$(cat /run/munge/munged.pid)"
    ;;
esac
