package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func ExampleClient_Run() {
	server := clienttest.New() // stands in for executord
	if err := server.Listen("127.0.0.1:0"); err != nil {
		panic(err)
	}
	defer server.Close()

	c, err := client.Dial(client.Config{Address: server.Address()})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	result, err := c.Run(context.Background(), &executorv1.ExecuteRequest{
		Command: &executorv1.Command{Args: []string{"out Hello from sandbox", "exit 3"}},
	}, os.Stdout, os.Stderr)
	if err != nil {
		panic(err)
	}
	fmt.Println(result.GetReason(), result.GetExitCode())
	// Output:
	// Hello from sandbox
	// REASON_EXITED 3
}

func ExampleClient_Watch() {
	server := clienttest.New()
	if err := server.Listen("127.0.0.1:0"); err != nil {
		panic(err)
	}
	defer server.Close()
	c, err := client.Dial(client.Config{Address: server.Address()})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	ctx := context.Background()
	answer, err := c.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{
		Command: &executorv1.Command{Args: []string{"out one", "cut", "out two"}},
	})
	if err != nil {
		panic(err)
	}

	// nil is the beginning; a program that was interrupted goes on at the cursor that
	// it kept.
	stream, err := c.Watch(ctx, answer.GetExecution().GetName(), nil)
	if err != nil {
		panic(err)
	}
	defer stream.Close()
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break // the result has come
		}
		if err != nil {
			panic(err)
		}
		if output := event.GetOutput(); output != nil {
			fmt.Printf("%d %s", event.GetCursor().GetSequence(), output.GetData())
		}
	}
	fmt.Println(stream.Result().GetOutcome(), stream.Whole(), stream.Cursor().GetSequence())
	// Output:
	// 2 one
	// 3 two
	// OUTCOME_SUCCESS true 4
}
