"""SIM: a whole cluster in one thread, on virtual time. Router, agents and machines are production's, composed by production.

    loop       virtual time, processes, tasks with numbers          world      builds a cluster, loads it, keeps the trace
    net        streams and questions with latency, cuts, resets     faults     what is drawn from a seed
    wires      control plane and prober over it                     scenarios  what is told on purpose
    engine     a simulated SGLang; `words` is its model             oracle     what must be true afterwards
    launcher   engines as processes of a host                       client     who asks, and judges each answer

What is not production here: `ControlServer` and `ControlClient` (the frames are), `Prober`'s HTTP (what it asks and concludes is), the
launcher and the engines, and aiohttp's clients. Keys, tokens, registrations, locks and records are real files in a folder of their own.

A new kind of fault: a class in `faults` with `begin` and `end`, named in `KINDS`. A new story: a coroutine function in `scenarios` that
takes the world, and `simulate(Plan(1), script=...)` in a test; the oracle judges it like every run. A new promise: a clause in `oracle`,
and a bug in `world.DEFECTS` that breaks it. Everything that happens is the same for the same seed and the same code; a failing seed is
replayed with `./scripts/simulate --seed N --trace`. So nothing here may depend on addresses of objects, on hashes of strings, or on the
real clock.
"""
