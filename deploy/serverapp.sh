#!/bin/sh
# The executor of ServerApps: serverapp.sh [option of flower-superexec ...]
#
# flower-superexec ends at once on SIGTERM, and the container with it. Here ServerApps are told first, and waited for:
# they park their rounds (docs/operations.md), for as long as the container's stop_grace_period lets them.
set -eu

apps() { # what the executor has started and still runs
  cat /proc/[0-9]*/stat 2>/dev/null | awk -v executor="$executor" '$4 == executor && $3 != "Z" { print $1 }'
}

park() {
  executor=${!:-} # known from the fork on: a variable that is set in the next line would come too late
  [ "$executor" ] || exit 0
  kill -STOP "$executor" # which starts no other meanwhile
  for app in $(apps); do kill "$app" 2>/dev/null || true; done
  while [ -n "$(apps)" ]; do sleep 0.2; done
  kill "$executor" && kill -CONT "$executor"
  wait "$executor" || true
  exit 0
}

trap park TERM INT
flower-superexec "$@" &
wait $!
