"""Who is there: the table of engines, their health and the view that the router reads."""
