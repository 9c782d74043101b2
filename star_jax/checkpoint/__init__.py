"""How are configs, weights and training states saved and loaded?"""
