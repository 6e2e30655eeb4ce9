// Clients in Go: every way of dialling that grpc-go has, and go-spiffe.
//
//	go run . SOCKET
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"durward.test/interop/dials"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

const (
	patience = 20 * time.Second
	expected = "spiffe://example.org/myservice"
)

var failed bool

func check(name string, err error) {
	if err != nil {
		fmt.Printf("FAILED: %s: %v\n", name, err)
		failed = true
	}
}

func fetch(conn *grpc.ClientConn) error {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	// The second call refers to what the first has put into the header table.
	for range 2 {
		answer, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
		if err != nil {
			return err
		}
		if got := answer.Svids[0].SpiffeId; got != expected {
			return fmt.Errorf("got %s", got)
		}
	}
	return nil
}

func present() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	if svid.ID.String() != expected {
		return fmt.Errorf("got %s", svid.ID)
	}
	token, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "them"})
	if err != nil {
		return err
	}
	_, err = workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "them")
	return err
}

func main() {
	socket := os.Args[1]
	ways := dials.Ways(socket)
	for name, dial := range ways {
		conn, err := dial()
		if err == nil {
			err = fetch(conn)
		}
		check(name, err)
	}
	check("go-spiffe", present())
	if failed {
		os.Exit(1)
	}
	fmt.Printf("go: %d ways of dialling, go-spiffe\n", len(ways))
}
