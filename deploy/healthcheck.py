"""Asks a container's gRPC health service: `healthcheck.py [ADDRESS]` exits with 0 when it serves, with 1 when not."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

ADDRESS = "127.0.0.1:9099"  # where every role listens inside its own container
SECONDS = 3.0  # for the answer


def serving(address: str, seconds: float = SECONDS) -> bool:
    """Whether the health service at `address` answers SERVING within `seconds`."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1] if len(sys.argv) > 1 else ADDRESS) else 1)
