"""The Lightning layer: LoRAs and distilled weights for Wan2.2. It knows names and tensors, never the network."""
