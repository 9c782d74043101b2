"""How do captions become numbers?

A frozen pretrained encoder (`encoder.load`), read from a Hugging Face folder (`encoder_folder`),
and a cache of its features on disk (`cache`).
"""
