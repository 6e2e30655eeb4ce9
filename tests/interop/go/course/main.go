// go-spiffe through what the script that runs it does. Its steps come by lines: what a watch of it must have, and a call, by then.
//
//	go run ./course SOCKET
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const patience = 90 * time.Second

// What the watch was told last: serial numbers by the last part of a SPIFFE ID.
type watch struct {
	sync.Mutex
	serials map[string]string
}

func (w *watch) OnX509ContextUpdate(update *workloadapi.X509Context) {
	serials := map[string]string{}
	for _, svid := range update.SVIDs {
		serials[last(svid.ID.Path())] = svid.Certificates[0].SerialNumber.String()
	}
	w.Lock()
	defer w.Unlock()
	w.serials = serials
}

// A watch goes on by itself: what it meets in between is its own business.
func (w *watch) OnX509ContextWatchError(error) {}

func (w *watch) now() map[string]string {
	w.Lock()
	defer w.Unlock()
	return w.serials
}

func last(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// Whether the watch has these identities, none of them as it was before.
func (w *watch) has(want []string, before map[string]string) bool {
	serials := w.now()
	for _, id := range want {
		if serials[id] == "" || serials[id] == before[id] {
			return false
		}
	}
	return len(serials) == len(want)
}

func called(client *workloadapi.Client, want []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tokens, err := client.FetchJWTSVIDs(ctx, jwtsvid.Params{Audience: "a"})
	if err != nil {
		return err
	}
	var got []string
	for _, token := range tokens {
		got = append(got, last(token.ID.Path()))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("got %v", got)
	}
	return nil
}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+os.Args[1]))
	if err != nil {
		panic(err)
	}
	defer client.Close()
	watch, before := &watch{}, map[string]string{}
	go client.WatchX509Context(ctx, watch)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		step, ids, _ := strings.Cut(lines.Text(), " ")
		if step == "forget" {
			before = watch.now()
			continue
		}
		want := strings.Split(ids, ",")
		for late := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			err := fmt.Errorf("the watch was told of %v", watch.now())
			if watch.has(want, before) {
				err = called(client, want)
			}
			if err == nil {
				break
			}
			if time.Now().After(late) {
				fmt.Fprintf(os.Stderr, "FAILED: %s: %v\n", step, err)
				os.Exit(1)
			}
		}
		fmt.Printf("%s: %s\n", step, ids)
	}
}
