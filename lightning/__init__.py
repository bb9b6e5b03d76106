"""LoRAs of every kind and distilled weights: opened, matched, merged, baked and inspected; runs no network."""
