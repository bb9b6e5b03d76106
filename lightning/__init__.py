"""The Lightning layer: LoRAs and distilled weights for Wan2.2. It knows names, tensors and releases, never the network."""
