"""Images: named datasets, the tensor store that holds them on the device, batched augmentation.

Importing this package, or :mod:`fedcl.data.catalog`, loads no torch; the other modules do.
"""
