"""What several tests need: checkpoints, families, a Hub, a device, a disk that fails."""
