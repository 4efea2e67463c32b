"""ComfyUI's nodes, thin: unpack the sockets, call the library."""
