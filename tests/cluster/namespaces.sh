#!/usr/bin/env bash
# Make "machines" on this one, as root: network namespaces mb1, mb2, ... with addresses 10.77.0.1, .2, ... on a bridge.
#     bash tests/cluster/namespaces.sh up|down [N]
set -euo pipefail
count=${2:-2}
case $1 in
up)
    ip link add mb-bridge type bridge
    ip link set mb-bridge up
    for i in $(seq "$count"); do
        ip netns add "mb$i"
        ip link add "mb-veth$i" type veth peer name eth0 netns "mb$i"
        ip link set "mb-veth$i" master mb-bridge up
        ip -n "mb$i" addr add "10.77.0.$i/24" dev eth0
        ip -n "mb$i" link set eth0 up
        ip -n "mb$i" link set lo up
    done
    ;;
down)
    for i in $(seq "$count"); do
        ip netns del "mb$i" 2> /dev/null || true
        # The kernel removes it later, or never while a process runs there, and until then its name is taken.
        ip link del "mb-veth$i" 2> /dev/null || true
    done
    ip link del mb-bridge 2> /dev/null || true
    ;;
esac
