"""How long do sampling, training, attention and data reading take, beside the machine's limits?"""
