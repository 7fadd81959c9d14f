"""The DNS of our mail domains: which records there should be, and which there are. No rows, no HTTP."""
