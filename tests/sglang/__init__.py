"""Real SGLang on a CPU, with real Mooncake transfer over TCP: what disagg promises about it, seen on the real thing."""
