"""Flower at the edge of the merge core: rounds over gRPC, in simulation, or in this process."""
