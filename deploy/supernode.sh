#!/usr/bin/env bash
# One SuperNode of several on a host, and its executor: supernode.sh FOLDER SITES [option of flower-supernode ...]
#
# It becomes the first of the sites 0 ... SITES - 1 that no other container is, with that site's part of the data and,
# where FOLDER/site-N is not empty, its private key. The lock on that file goes with the container, however it ends.
# When either of the two processes ends, both do: what restarts the container restarts the site as a whole.
set -eu

folder=$1 sites=$2
shift 2

fail() {
  echo "supernode.sh: $1" >&2
  exit 1
}

take_a_site() {
  for ((number = 0; number < sites; number++)); do
    site=$folder/site-$number
    [ -e "$site" ] || : >"$site" || fail "no key $site: deploy/certs.sh -n $sites makes it"
    exec 9<"$site"
    if flock --nonblock 9; then return; fi
  done
  fail "all $sites sites of $folder are taken: raise CLIENTS in .env, and make keys for as many"
}

stop() { # STATUS
  kill %1 %2 2>/dev/null || true
  wait
  exit "$1"
}

take_a_site
if [ -s "$site" ]; then set -- "$@" --auth-supernode-private-key "$site"; fi
trap 'stop 0' TERM INT
flower-supernode "$@" --isolation process --host 127.0.0.1 --port 9094 \
  --node-config "name=\"site-$number\" partition-id=$number num-partitions=$sites" &
flower-superexec --insecure --runtime-api-address 127.0.0.1:9094 &
ended=0
wait -n || ended=$?
stop "$ended"
