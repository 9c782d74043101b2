"""How do configs, weights and training states reach the disk and come back?"""
