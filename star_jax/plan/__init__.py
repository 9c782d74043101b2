"""What does a run need on machines that it has not started on?"""
