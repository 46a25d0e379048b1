"""What makes remote providers dependable and affordable: retries, rate limits, circuit breakers, budgets, batching."""
