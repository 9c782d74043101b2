"""How much memory and time will a run need on given machines?"""
