"""Pure decisions: which pair serves a request, what may start, who changes its role."""
