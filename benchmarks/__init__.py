"""Speed and memory beside peers and limits, as ratios measured in one run."""
