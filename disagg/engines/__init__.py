"""Engines: what one must offer, how one is started and watched, and the embedded one."""
