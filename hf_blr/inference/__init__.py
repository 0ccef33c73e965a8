"""What runs at inference beside the layers themselves: fused projections, attention of one query, launch settings."""
