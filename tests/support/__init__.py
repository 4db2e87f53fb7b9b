"""What tests need in modules that spawned processes can import. The library does not use it."""
