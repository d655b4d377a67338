#!/usr/bin/env bash
# A run on machines without a scheduler: mpirun over a host file.
#
#   launch/scripts/hosts.sh HOSTS RANKS CONFIG [--set KEY=VALUE]…
#
# HOSTS is Open MPI's host file, one line per machine: `node1 slots=2`. Every machine needs this
# clone (built) and the run directory at the same path, the same Open MPI, and ssh without a
# password from here. `oxitron launch CONFIG --ranks N --hosts HOSTS` does the same and also draws
# progress, watches the ranks and cleans up behind them; this is the plain form, to adapt.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 HOSTS RANKS CONFIG [--set KEY=VALUE]…" >&2; exit 2; }
hosts=$1 ranks=$2
shift 2
oxitron=$(realpath "${CARGO_TARGET_DIR:-target}/release/oxitron")

# Each rank computes with its share of the cores of a machine, all machines being alike.
slots=$(grep -v '^ *#' "$hosts" | grep -o 'slots=[0-9]*' | cut -d= -f2 | sort -n | tail -n 1 || true)
[ -n "$slots" ] || { echo "$hosts: expected one line 'HOST slots=N' per machine" >&2; exit 2; }
threads=$(($(nproc) / slots))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# --bind-to none: Open MPI would tie each rank, with all its threads, to one core or socket.
exec mpirun --hostfile "$hosts" -n "$ranks" --bind-to none --wdir "$PWD" -x OMP_NUM_THREADS \
    "$oxitron" train "$@"
