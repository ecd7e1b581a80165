#!/usr/bin/env bash
# A Slurm cluster of one node on loopback, for tests: no systemd, no cgroups, no accounting, all its state in one folder.
#
#   tests/external/slurm_node.sh install          slurm-wlm and munge from Debian or Ubuntu (root, or sudo)
#   tests/external/slurm_node.sh start FOLDER
#   tests/external/slurm_node.sh stop FOLDER
#
# Start and stop need root, as Slurm's daemons do. Its configuration is linked from /etc/slurm, where it is looked for:
# the executor takes SLURM_CONF out of the environment of its jobs. A machine that has one there already is left alone.
set -euo pipefail

packages() {
    local sudo=
    if ((EUID)); then sudo=sudo; fi
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq --yes --no-install-recommends slurm-wlm munge
}

configure() {
    local host ports
    host=$(hostname -s)
    read -ra ports < <(python3 -c '
import socket
free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(server.getsockname()[1] for server in free))')
    mkdir -p "$1"/{state,spool,log}
    # Jobs that have ended stay visible to squeue for an hour; a node that comes back is used again at once.
    cat > "$1/slurm.conf" << CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    # Two files of the system stand for GPUs: Slurm counts and numbers them, nothing opens them.
    printf 'Name=gpu File=/dev/%s\n' null zero > "$1/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$1/cgroup.conf"
}

start() {
    if [ -e /etc/slurm/slurm.conf ]; then
        echo "/etc/slurm/slurm.conf is there: this machine belongs to a cluster" >&2
        return 1
    fi
    configure "$1"
    mkdir -p /etc/slurm
    ln -sf "$1"/*.conf /etc/slurm/
    install -d -o munge -g munge -m 755 /run/munge
    munge -n > /dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
    slurmctld
    slurmd
    for _ in $(seq 300); do
        if sinfo --noheader --format=%T | grep -q idle; then
            return
        fi
        sleep 0.2
    done
    tail "$1"/log/*.log >&2
    return 1
}

stop() {
    scancel --full --user="$(id -un)" || true
    scontrol shutdown
    for name in slurm cgroup gres; do
        if [ "$(readlink "/etc/slurm/$name.conf")" = "$1/$name.conf" ]; then rm "/etc/slurm/$name.conf"; fi
    done
}

case "${1:-}" in
    install) packages ;;
    start) start "$(realpath -m "$2")" ;;
    stop) stop "$(realpath "$2")" ;;
    *) sed -n '2,9s/^# \?//p' "$0" ;;
esac
