"""The settings of a run: schema, presets and protocols, merging, checking."""
