"""What benchmarks/gateway.py is made of: an upstream, a load, the gateways, and what is measured of them."""
