#!/usr/bin/env bash
# docker-compose.yml for real: a SuperLink over TLS, three clients, two rounds, one client killed in between; exits with
# 0 when the model is on the volume. It takes its own project, certificates and volumes, and removes them.
#
#   ENGINE    docker or podman           COMPOSE   the compose command, `docker compose`
# The image is built where it is missing; what else .env.example names is taken from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

ENGINE=${ENGINE:-docker}
COMPOSE=${COMPOSE:-docker compose}
scratch=$(mktemp -d)
export COMPOSE_PROJECT_NAME=fedbasin-smoke COMPOSE_PROFILES=tls CLIENTS=3
export CERTS=$scratch/certs SITES=$scratch/certs/keys FLEET_ADDRESS=127.0.0.1 FLEET_PORT=${FLEET_PORT:-9092}

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
compose() { $COMPOSE --env-file .env.example "$@"; }
cli() { compose run --rm --no-TTY cli "$@" 2>>"$scratch/said"; }
server() { compose exec --no-TTY serverapp "$@" 2>>"$scratch/said"; }

finish() {
  status=$?
  if [ "$status" != 0 ]; then
    say "failed"
    tail -n 20 "$scratch/said" >&2 || true
    compose logs --tail 40 >&2 || true
  fi
  compose --profile '*' down --volumes --timeout 10 >>"$scratch/said" 2>&1 || true
  [ -z "${checks:-}" ] || kill "$checks" 2>/dev/null || true
  rm -rf "$scratch"
  exit "$status"
}

certificates() { # owned by whom the containers run as, which is not root
  deploy/certs.sh -d "$CERTS" -n 3 >>"$scratch/said"
  if [ "$(id -u)" = 0 ]; then chown -R "${USER_ID:=1000}" "$scratch"; else USER_ID=$(id -u); fi
  export USER_ID
}

run_health_checks() { # podman leaves them to systemd's timers; where there are none, somebody has to ask
  while sleep 2; do
    for container in $(podman ps --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME"); do
      podman healthcheck run "$container" >/dev/null 2>&1 || true
    done
  done
}

within() { # SECONDS COMMAND ...: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || { say "in vain: $*"; return 1; }
    sleep 2
  done
}

online() { [ "$(cli flwr supernode list --format json | grep -c '"status": "online"')" = "$1" ]; }
has_finished() { server test -e "runs/$run/round-000$1.json"; }
has_ended() { cli flwr ls --run-id "$run" --format json | grep -q '"status": "finished:completed"'; }

load='import sys; from safetensors.numpy import load_file
print(f"{sys.argv[1]}: {sum(array.size for array in load_file(sys.argv[1]).values()):,} numbers")'

told() { # ROUND: what its record says
  server python3 - "runs/$run/round-000$1.json" <<'END'
import json, sys
record = json.load(open(sys.argv[1]))
training = record["exchanges"][0]
names = sorted(client["name"] for client in training["clients"].values())
print(f"{record['status']} {len(names)} replies of {training['asked']} ({', '.join(names)}),",
      f"accuracy {record['test']['accuracy']:.3f} on the server's data")
END
}

trap finish EXIT
: >"$scratch/said"
certificates
if [ "$ENGINE" = podman ] && [ ! -d /run/systemd/system ]; then run_health_checks & checks=$!; fi

say "docker compose up: SuperLink, ServerApp executor, three SuperNodes with their keys"
compose up --detach --quiet-pull >>"$scratch/said" 2>&1
within 180 online 3
say "3 clients are online"
run=$(cli flwr run . --format json -c "rounds=2 min-clients=2 quorum=2 deadline=120 evaluate=false training.epochs=5" | grep '"run-id"' | tr -cd 0-9)
say "flwr run: run $run"
within 300 has_finished 1
told=$(told 1)
say "round 1: $told"
victim=$(compose ps --quiet supernode | head -n 1)
"$ENGINE" kill "$victim" >>"$scratch/said"
say "killed client $(printf %.12s "$victim")"
within 300 has_finished 2
told=$(told 2)
say "round 2: $told"
[[ $told = *' 2 replies '* ]] || { say "two replies were expected"; exit 1; }
within 120 has_ended
say "the run has finished; on the volume:"
server ls -l "runs/$run"
loaded=$(server python3 -c "$load" "runs/$run/round-0002.safetensors")
say "$loaded"
