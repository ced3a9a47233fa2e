"""What every gRPC server and client of Ebbflow does alike."""
