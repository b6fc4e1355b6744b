"""Presets, protocols and recorded experiments: YAML and thin scripts, no logic."""
