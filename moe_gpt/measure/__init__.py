"""Numbers that training, plans and reports share.

Routing statistics, health of routers, parameters, FLOPs, memory. Read ``routing.py`` first.
"""
